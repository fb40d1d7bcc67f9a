"""The depth that a request's images follow: a map that it brings, or that of its image."""

from ldm_runtime.errors import RequestError
from ldm_runtime.requests.request import GenerationRequest
from ldm_runtime.requests.resolved import Depth, EstimatedDepth, GivenDepth, NoDepth
from ldm_runtime.specs.model import ModelSpec
from ldm_runtime.specs.networks import DepthEstimatorSpec
from ldm_runtime.specs.tasks import task_record


def depth_of(request: GenerationRequest, spec: ModelSpec) -> Depth:
    """Return the depth of a request whose fields fit its model's task.

    Raises:
        RequestError: It has an image alone, whose depth this model cannot estimate.
    """
    if "depth_map" not in task_record(spec).takes:
        return NoDepth()
    if request.depth_map is not None:
        return GivenDepth(depth_map=request.depth_map)
    if spec.find(DepthEstimatorSpec) is None:
        raise RequestError(
            "depth_map",
            "is missing, and this bundle was exported from a checkpoint without a depth estimator "
            "(depth_model.*); give the depth of the image",
        )
    return EstimatedDepth()
