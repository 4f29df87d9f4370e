"""MLflow, a view of the work: curves while training, finished results from their files.

The files are the truth. One run per cell is found by a key made of its params, so that the run
that training opened is the one that `publish` completes, and other params make other runs. No
model is pickled, nothing is reported home. Importing this imports neither MLflow nor torch.
"""

from nemo.tracking.live import RunLogger, training_run
from nemo.tracking.publish import Summary, publish, publish_quietly
from nemo.tracking.store import TrackingError

__all__ = ["RunLogger", "Summary", "TrackingError", "publish", "publish_quietly", "training_run"]
