"""`mindspore_gs.ptq.round_to_nearest`."""

from gs_dist.golden_stick.ptq.ptq import RoundToNearest

__all__ = ["RoundToNearest"]
