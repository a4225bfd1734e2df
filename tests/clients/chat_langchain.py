"""LangChain's OpenAI client, against the endpoint of OWL_URL."""

import json
import os

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

chat = ChatOpenAI(
    model="owl",
    base_url=f"{os.environ['OWL_URL']}/v1",
    api_key=os.environ["OWL_API_KEY"],
    max_tokens=8,
    temperature=0,
    max_retries=0,
)
picture = {"type": "image_url", "image_url": {"url": os.environ["OWL_PICTURE"]}}
messages = [HumanMessage(content=[picture, {"type": "text", "text": "what color ?"}])]
whole = chat.invoke(messages)
streamed = "".join(str(chunk.content) for chunk in chat.stream(messages))
batch = [answer.content for answer in chat.batch([messages, messages])]
print(json.dumps({"whole": whole.content, "streamed": streamed, "batch": batch, "usage": whole.usage_metadata}))
