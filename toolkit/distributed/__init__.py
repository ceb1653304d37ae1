"""Process groups, engines and Accelerate: everything that knows how many processes there are."""
