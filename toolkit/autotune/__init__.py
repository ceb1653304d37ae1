"""What `auto` means on this machine: measured, kept, and decided by pure functions.

1. `question.py`: what is left open by config and launcher, and the products of the model.
2. `cache.py`: timings that this machine has taken before, in the user's cache folder.
3. `measure.py`: a micro-benchmark of the model's own products, where there are none.
4. `choices.py`: what follows from timings. `choose.py` goes through all of it on rank 0.

No torch but in `measure.py`.
"""
