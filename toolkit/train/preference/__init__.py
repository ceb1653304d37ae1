"""Train modules that learn from preferences, and from a teacher."""
