"""Operators on plain tensors: no Pyro, no models; each fast one stands beside a reference in a few plain lines."""

from pyro_ssm.ops import resampling
from pyro_ssm.ops.associative_scan import affine_scan, associative_scan
from pyro_ssm.ops.block_diagonal import block_diagonal
from pyro_ssm.ops.brownian import BrownianPath
from pyro_ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference
from pyro_ssm.ops.combiner_path import combiner_path, combiner_path_reference
from pyro_ssm.ops.composite import composite_backward
from pyro_ssm.ops.coordinate_scale import CoordinateScale
from pyro_ssm.ops.dense_lti import dense_lti, dense_lti_reference
from pyro_ssm.ops.diag_lti import diag_lti, diag_lti_reference
from pyro_ssm.ops.discretise import discretise
from pyro_ssm.ops.dplr import cauchy, dplr_kernel, dplr_scan, dplr_scan_reference
from pyro_ssm.ops.dplr_lti import dplr_lti
from pyro_ssm.ops.euler_network_path import EulerPathDraw, euler_network_path, euler_network_path_reference
from pyro_ssm.ops.hilbert import hilbert_index, hilbert_order
from pyro_ssm.ops.hippo import NormalPlusLowRank, hippo, hippo_low_rank
from pyro_ssm.ops.info import OpsInfo, info
from pyro_ssm.ops.interpolation import (
    fill_forward,
    fill_linear,
    interpolate,
    interpolation_coefficients,
    interpolation_slope,
    rectilinear_path,
)
from pyro_ssm.ops.kalman import kalman_filter_reference
from pyro_ssm.ops.kalman_backward import (
    backward_conditionals_reference,
    backward_sample_reference,
    kalman_smoother_reference,
)
from pyro_ssm.ops.kalman_filter import kalman_filter, kalman_log_likelihood
from pyro_ssm.ops.kalman_parallel import backward_sample_parallel, kalman_filter_parallel, kalman_smoother_parallel
from pyro_ssm.ops.kalman_smoother import backward_conditionals, backward_sample, kalman_smoother
from pyro_ssm.ops.linalg import tria
from pyro_ssm.ops.linear_scan import linear_scan, linear_scan_reference
from pyro_ssm.ops.linear_sde import LinearStep, linear_sde_step, linear_sde_step_reference, stationary_root
from pyro_ssm.ops.ode import ode_flow, ode_path
from pyro_ssm.ops.quadrature import SigmaPoints, cubature_rule, gauss_hermite_rule, unscented_rule
from pyro_ssm.ops.radial import RadialMoments, radial_basis, radial_moments
from pyro_ssm.ops.random import standard_normals
from pyro_ssm.ops.recurrent_scan import elman_scan, elman_scan_reference, gru_scan, gru_scan_reference
from pyro_ssm.ops.runge_kutta import Tolerance
from pyro_ssm.ops.scan2x2 import scan2x2, scan2x2_reference
from pyro_ssm.ops.sde import SDEStep, sde_path, sde_step
from pyro_ssm.ops.selective_scan import selective_scan, selective_scan_reference
from pyro_ssm.ops.softplus import softplus
from pyro_ssm.ops.softplus_network import softplus_network, softplus_network_reference
from pyro_ssm.ops.solver_error import SolverError
from pyro_ssm.ops.ssd import ssd, ssd_reference
from pyro_ssm.ops.ssm_kernel import fft_conv, ssm_kernel, ssm_kernel_reference
from pyro_ssm.ops.taper import gaspari_cohn
from pyro_ssm.ops.torchdiffeq_path import torchdiffeq_flow, torchdiffeq_path
from pyro_ssm.ops.torchsde_path import torchsde_path
from pyro_ssm.ops.weights import Normalised, normalise, normalise_reference

__all__ = [
    "BrownianPath",
    "CoordinateScale",
    "EulerPathDraw",
    "LinearStep",
    "NormalPlusLowRank",
    "Normalised",
    "OpsInfo",
    "RadialMoments",
    "SDEStep",
    "SigmaPoints",
    "SolverError",
    "Tolerance",
    "affine_scan",
    "associative_scan",
    "backward_conditionals",
    "backward_conditionals_reference",
    "backward_sample",
    "backward_sample_parallel",
    "backward_sample_reference",
    "block_diagonal",
    "cauchy",
    "causal_conv1d",
    "causal_conv1d_reference",
    "combiner_path",
    "combiner_path_reference",
    "composite_backward",
    "cubature_rule",
    "dense_lti",
    "dense_lti_reference",
    "diag_lti",
    "diag_lti_reference",
    "discretise",
    "dplr_kernel",
    "dplr_lti",
    "dplr_scan",
    "dplr_scan_reference",
    "elman_scan",
    "elman_scan_reference",
    "euler_network_path",
    "euler_network_path_reference",
    "fft_conv",
    "fill_forward",
    "fill_linear",
    "gaspari_cohn",
    "gauss_hermite_rule",
    "gru_scan",
    "gru_scan_reference",
    "hilbert_index",
    "hilbert_order",
    "hippo",
    "hippo_low_rank",
    "info",
    "interpolate",
    "interpolation_coefficients",
    "interpolation_slope",
    "kalman_filter",
    "kalman_filter_parallel",
    "kalman_filter_reference",
    "kalman_log_likelihood",
    "kalman_smoother",
    "kalman_smoother_parallel",
    "kalman_smoother_reference",
    "linear_scan",
    "linear_scan_reference",
    "linear_sde_step",
    "linear_sde_step_reference",
    "normalise",
    "normalise_reference",
    "ode_flow",
    "ode_path",
    "radial_basis",
    "radial_moments",
    "rectilinear_path",
    "resampling",
    "scan2x2",
    "scan2x2_reference",
    "sde_path",
    "sde_step",
    "selective_scan",
    "selective_scan_reference",
    "softplus",
    "softplus_network",
    "softplus_network_reference",
    "ssd",
    "ssd_reference",
    "ssm_kernel",
    "ssm_kernel_reference",
    "standard_normals",
    "stationary_root",
    "torchdiffeq_flow",
    "torchdiffeq_path",
    "torchsde_path",
    "tria",
    "unscented_rule",
]
