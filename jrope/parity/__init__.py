"""The same weights and tokens through transformers and jrope, stage by stage.

A few tokens are placed at chosen positions, so that position 131071 costs what position
0 costs.  Each segment is a row of its own; transformers gets the rows one by one.

What is judged:

- float32: the largest difference of a logit from PyTorch's, as a part of the largest
  logit, is at most `threshold` in every segment.
- bfloat16, float16: both are compared with PyTorch in float32 on the same rounded
  weights, and jrope's error is at most 1.10 times PyTorch's.  The error is the relative
  RMS of a token's logits, geometric mean over tokens: a few tokens of a trained model
  (attention sinks) err a hundred times more than the rest, and what they dominate, a
  maximum or an RMS over all, is the luck of one rounding.  Tokens of one row share that
  luck, hence each segment is run 8 times with other tokens; the ratio then has a
  standard error of 0.03 for a trained model of 135M, less for random ones.

- the frequencies, number by number: the last bits of PyTorch's depend on the processor,
  so those few are told by name, and its model then runs with jrope's, which leaves all
  else to be compared; more than such bits (see `frequencies.limit`) is a failure.
- NaN or infinity on either side is a failure, told with the stage where it began.

For dynamic NTK and longrope the length is the row's largest position + 1 on both sides.
"""

from jrope.parity.comparison import DTYPES as DTYPES
from jrope.parity.comparison import compare as compare
from jrope.parity.comparison import jrope_stages as jrope_stages
from jrope.parity.comparison import place as place
from jrope.parity.report import Report as Report
from jrope.parity.torch_side import torch_stages as torch_stages
