"""Drafts: several tokens that are verified in one pass through Llama, for the same answers in fewer passes."""
