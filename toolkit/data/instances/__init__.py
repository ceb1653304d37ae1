"""From token files to rows of one length."""
