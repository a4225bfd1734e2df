"""The four programs that run on Ray: curation, training, evaluation, serving."""
