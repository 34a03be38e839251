"""Where weights act on a live U-Net: its sites, hooks that weigh them, and a schedule looked up at each call's noise
level.

`sites.py`, `names.py`: the places, and what other tools call them; `attachment.py`: hooks that multiply each site by
its weight of *this* call (with `scope.py`, `checkpointing.py`, `join.py`, `follow.py`); `apply.py`: a schedule on any
diffusers pipeline; `mapping.py`: a schedule for another network; `neighbours.py`: FreeU and Skip-Tuning as schedules.
Importing this package loads no torch.
"""
