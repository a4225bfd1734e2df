"""A model folder and a benchmark's files → answers, scores and a report, on Ray Data."""
