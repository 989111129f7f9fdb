"""fastkd: the knowledge-distillation loss over large vocabularies, forward and backward in one pass."""

from fastkd._dispatch import use_backend as use_backend
from fastkd._labels import check_labels as check_labels
from fastkd._version import __version__ as __version__
from fastkd.distributed import global_items as global_items
from fastkd.divergences import JSD as JSD
from fastkd.divergences import Divergence as Divergence
from fastkd.divergences import SkewKL as SkewKL
from fastkd.divergences import SkewReverseKL as SkewReverseKL
from fastkd.divergences import SymmetricKL as SymmetricKL
from fastkd.functional import KDLossParts as KDLossParts
from fastkd.functional import kd_loss as kd_loss
from fastkd.functional import log_softmax as log_softmax
from fastkd.hidden import HiddenLoss as HiddenLoss
from fastkd.hidden import HiddenLossParts as HiddenLossParts
from fastkd.hidden import hidden_loss as hidden_loss
from fastkd.layers import CopyReport as CopyReport
from fastkd.layers import capture as capture
from fastkd.layers import copy_layers as copy_layers
from fastkd.layers import layer_map as layer_map
from fastkd.modules import KDLoss as KDLoss
from fastkd.sources import LinearLogits as LinearLogits
from fastkd.sources import TopK as TopK
from fastkd.teachers import sample_tokens as sample_tokens
from fastkd.teachers import top_k as top_k
