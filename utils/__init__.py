"""Shared helpers of the age-estimation course; the notebooks tell the story."""
