"""Curated Arrow → a trained model folder, on Ray Train."""
