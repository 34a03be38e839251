"""What is learned and exchanged: the schedule, the noise levels that index it, the weight function that makes it.

`schedule.py`: the table of weights and its file; `noise.py`: noise levels; `weights.py`: from a vector of numbers to
a table; `schema/`: the JSON Schema of the file. Loads no torch.
"""

from rwopt.schedule.noise import noise_block, noise_table, sigma_of
from rwopt.schedule.schedule import Schedule

__all__ = ["Schedule", "noise_block", "noise_table", "sigma_of"]
