"""Conversations, and prompts with answers: from rows of files to text with targets."""
