"""How curvature is computed (``backend=``, ``backend_kwargs=``): interfaces and the built-in back ends."""

from laplace.curvature.autograd import AutogradEF, AutogradGGN, AutogradHessian
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface

__all__ = ["AutogradEF", "AutogradGGN", "AutogradHessian", "CurvatureInterface", "EFInterface", "GGNInterface"]
