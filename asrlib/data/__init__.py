"""Corpora, transcripts and batches."""
