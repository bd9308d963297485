"""Names of laplace-torch's older back ends, after ASDL's former package; they stand for the ASDL back ends."""

from laplace.curvature.asdl import AsdlEF as AsdfghjklEF
from laplace.curvature.asdl import AsdlGGN as AsdfghjklGGN
from laplace.curvature.asdl import AsdlHessian as AsdfghjklHessian
from laplace.curvature.asdl import AsdlInterface as AsdfghjklInterface

__all__ = ["AsdfghjklEF", "AsdfghjklGGN", "AsdfghjklHessian", "AsdfghjklInterface"]
