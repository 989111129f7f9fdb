"""Where distributions come from, other than a tensor of logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearLogits(NamedTuple):
    """Logits that are not there yet: ``softcap·tanh(x/softcap)`` of ``x = scale·(hidden @ weight.T + bias)``.

    :func:`fastkd.kd_loss` takes it for a tensor of logits, the student's, the teacher's or both, and computes them a
    chunk of rows at a time. The student's ``hidden``, ``weight`` and ``bias`` get gradients, in their dtypes.

    Example:
        >>> import torch, fastkd
        >>> head = torch.nn.Linear(8, 100)
        >>> student_hidden, teacher_hidden = torch.randn(4, 8), torch.randn(4, 16)
        >>> student = fastkd.LinearLogits(student_hidden, head.weight, head.bias)
        >>> teacher = fastkd.LinearLogits(teacher_hidden, torch.randn(100, 16), softcap=30.0)
        >>> fastkd.kd_loss(student, teacher, temperature=2.0).backward()
        >>> head.weight.grad.shape
        torch.Size([100, 8])
    """

    hidden: Tensor  #: (..., H) float32, bfloat16, float16 or float64
    weight: Tensor  #: (V, H), as nn.Linear's; of hidden's dtype unless under autocast
    bias: Tensor | None = None  #: (V,)
    scale: float = 1.0  #: of the product and its bias
    softcap: float | None = None  #: > 0


class TopK(NamedTuple):
    """A teacher who lists K tokens of each position: their ids, and their log-probabilities.

    :func:`fastkd.kd_loss` takes it for the teacher's logits. What a served model returns goes into it as it is, and
    :func:`fastkd.top_k` and :func:`fastkd.sample_tokens` make it of logits. With p_i the K probabilities and q_i the
    student's, of the softmax over the whole vocabulary, ``tail`` says what becomes of the other tokens:

    - ``"bucket"``: they are one more outcome, of mass ``1 − Σp`` and ``1 − Σq``. A true divergence, of K + 1 outcomes,
      never above that of the two whole distributions (the data processing inequality): it is 0 only if the student has
      the K and the mass of the rest right, and says nothing about which of the rest. Within the rest the gradient goes
      in proportion to the student's. For the top k of a teacher.
    - ``"renormalize"``: ``p_i/Σp``, and nothing outside; the student's are over the whole vocabulary. For samples, of
      which Σp is 1: of tokens drawn from the teacher the gradient of forward KL is unbiased (Anshumann et al., 2025,
      Sparse Logit Sampling). Of a top k it teaches that the rest has no mass. A reverse KL would be infinite.
    - ``"support"``: ``p_i/Σp`` and ``q_i/Σq``, the divergence of the two within the K. The student's mass outside is
      left alone, and needs another term, such as the cross-entropy.
    - ``"truncate"``: the sum over the K of the divergence's terms as they come, of forward KL ``Σ p_i·log(p_i/q_i)``.
      No divergence: it may be negative, and its least value is not at the teacher. For reproducing what others did.

    In a reverse KL with ``"bucket"`` the teacher's rest has a mass of 2⁻²⁴ at least, which float32 cannot tell from 0:
    the loss would be infinite. There is no rest where all tokens are listed.

    Example:
        >>> import torch, fastkd
        >>> teacher = fastkd.TopK(torch.tensor([[7, 2], [3, -1]]), torch.tensor([[0.6, 0.3], [0.8, 0.0]]).log())
        >>> student = torch.zeros(2, 10, requires_grad=True)
        >>> loss = fastkd.kd_loss(student, teacher)
        >>> round(loss.item(), 4)
        1.2797
    """

    ids: Tensor  #: (..., K) int32 or int64, distinct in a row; −1 is padding
    log_probs: Tensor  #: (..., K) float32, bfloat16, float16 or float64; of the whole vocabulary, at this temperature
    temperature: float = 1.0  #: which must be the loss's
    tail: str = "bucket"  #: what becomes of the other tokens
