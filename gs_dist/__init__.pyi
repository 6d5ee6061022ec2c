from gs_dist.progress import JobStatus as JobStatus
from gs_dist.terminal.library import evaluate as evaluate
from gs_dist.terminal.library import load_summary as load_summary
from gs_dist.terminal.library import plan as plan
from gs_dist.terminal.library import quantize as quantize
from gs_dist.terminal.library import show_report as show_report

__version__: str
