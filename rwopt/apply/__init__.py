"""Put weights on a live U-Net or pipeline, and take them off again.

`Attachment` is the mechanism: torch forward hooks that multiply each site by its weight of *this* call. `apply` is
the use: it looks a schedule up at the noise level of each U-Net call of any diffusers pipeline.
"""

from rwopt.apply.attachment import Attachment
from rwopt.apply.handle import Handle, apply

__all__ = ["Attachment", "Handle", "apply"]
