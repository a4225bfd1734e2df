"""A picture world that Owl makes itself: coloured shapes on a 3×3 board, true captions, questions with known answers.

It stands in for a web crawl where there is none: raw WebDataset shards with planted bad samples, an instruction set,
and a held-out set of colour-shape combinations that no training sample shows or names.
"""
