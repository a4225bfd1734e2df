// The openai client for Node, against the endpoint of OWL_URL: what it prints is compared with what Python's gets.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.OWL_URL}/v1`, apiKey: process.env.OWL_API_KEY, maxRetries: 0 });
const url = process.env.OWL_PICTURE;
const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url } }, { type: "text", text: "what color ?" }] }];
const asked = { model: "owl", messages, max_tokens: 8, temperature: 0 };

const whole = await client.chat.completions.create(asked);
let streamed = "", usage = null;
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
let refused = null;
try {
  await client.chat.completions.create({ ...asked, temperature: 3 });
} catch (problem) {
  refused = [problem.constructor.name, problem.status, problem.param];
}
const models = [];
for await (const model of await client.models.list()) models.push(model.id);
console.log(JSON.stringify({ whole: whole.choices[0].message.content, streamed, usage: usage.completion_tokens, refused, models }));
