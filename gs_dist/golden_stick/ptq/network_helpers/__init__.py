"""`mindspore_gs.ptq.network_helpers`."""

from gs_dist.ptq.network_helper import NetworkHelper

__all__ = ["NetworkHelper"]
