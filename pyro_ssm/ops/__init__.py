"""Operators on plain tensors: no Pyro, no models; each fast one stands beside a reference in a few plain lines."""

from pyro_ssm.ops import resampling
from pyro_ssm.ops.associative_scan import affine_scan, associative_scan
from pyro_ssm.ops.block_diagonal import block_diagonal
from pyro_ssm.ops.brownian import BrownianPath
from pyro_ssm.ops.combiner_path import combiner_path, combiner_path_reference
from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.hilbert import hilbert_index, hilbert_order
from pyro_ssm.ops.info import OpsInfo, info
from pyro_ssm.ops.kalman import (
    backward_conditionals,
    backward_sample_reference,
    kalman_filter_reference,
    kalman_smoother_reference,
)
from pyro_ssm.ops.kalman_parallel import backward_sample_parallel, kalman_filter_parallel, kalman_smoother_parallel
from pyro_ssm.ops.linalg import tria
from pyro_ssm.ops.linear_scan import linear_scan, linear_scan_reference
from pyro_ssm.ops.linear_sde import LinearStep, linear_sde_step, linear_sde_step_reference, stationary_root
from pyro_ssm.ops.recurrent_scan import elman_scan, elman_scan_reference, gru_scan, gru_scan_reference
from pyro_ssm.ops.sde import SDEStep, sde_path, sde_step
from pyro_ssm.ops.torchsde_path import torchsde_path

__all__ = [
    "BrownianPath",
    "LinearStep",
    "OpsInfo",
    "SDEStep",
    "affine_scan",
    "associative_scan",
    "backward_conditionals",
    "backward_sample_parallel",
    "backward_sample_reference",
    "block_diagonal",
    "combiner_path",
    "combiner_path_reference",
    "composite_backward",
    "elman_scan",
    "elman_scan_reference",
    "gru_scan",
    "gru_scan_reference",
    "hilbert_index",
    "hilbert_order",
    "info",
    "kalman_filter_parallel",
    "kalman_filter_reference",
    "kalman_smoother_parallel",
    "kalman_smoother_reference",
    "linear_scan",
    "linear_scan_reference",
    "linear_sde_step",
    "linear_sde_step_reference",
    "resampling",
    "sde_path",
    "sde_step",
    "stationary_root",
    "torchsde_path",
    "tria",
]
