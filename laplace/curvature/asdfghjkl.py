"""Names of laplace-torch's older back ends, by the package that ASDL was once: the ASDL ones are meant."""

from laplace.curvature.asdl import AsdlEF as AsdfghjklEF
from laplace.curvature.asdl import AsdlGGN as AsdfghjklGGN
from laplace.curvature.asdl import AsdlHessian as AsdfghjklHessian
from laplace.curvature.asdl import AsdlInterface as AsdfghjklInterface

__all__ = ["AsdfghjklEF", "AsdfghjklGGN", "AsdfghjklHessian", "AsdfghjklInterface"]
