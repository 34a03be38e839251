"""How a picture is made from noise: the loop that a search runs, its gradient, and several candidates at once.

`noise.py`: noise levels on the way; `denoise.py`: what one U-Net call says; `sample.py`: the loop; `batched.py`:
several candidates through one loop; `backprop.py`: from a reward of the picture back to the weights; `memory.py`: what
that takes. Importing this package loads no torch.
"""

GRADIENTS = ("full", "truncated", "detached")
"""Ways of a gradient through the sampler: `rwopt.sampling.backprop.GradientPath`."""
