"""A trained model in the form that fits its kind."""

from __future__ import annotations

from sivae_fast.contract import Model
from sivae_fast.inference import Inference
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.trained import check_kind


def run_of(model: Model, **options) -> Inference | CloudInference:
    """An image or point cloud model of `load`, ready for use; options of `Trained` without `weights`.

    Raises ValueError for a model of another kind, otherwise as `Trained` does.
    """
    check_kind(model.config, (*Inference.kinds, *CloudInference.kinds))
    use = CloudInference if model.config.model.kind in CloudInference.kinds else Inference
    return use(model, model.config, model.images, weights=model.facts["weights"], **options)
