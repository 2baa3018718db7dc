"""The forms in which an initialiser, regulariser or constraint may be passed, and kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

import anymha
from anymha.errors import ConfigError
from anymha.options.constraints import MaxNorm, UnitNorm
from anymha.options.initializers import Constant, GlorotUniform, HeNormal, Identity, VarianceScaling
from anymha.options.regularizers import L1, L1L2, L2, OrthogonalRegularizer
from anymha.options.serialization import described
from anymha.options.training import OBJECTS, checked_object
from tests.keras_reference import keras_values

KINDS = ("initializer", "regularizer", "constraint")


def config_of(**options: Any) -> anymha.AttentionConfig:
    return anymha.AttentionConfig(2, 3, **options)


# --- against Keras -------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_every_name_of_keras_gives_the_object_with_its_defaults(kind: str) -> None:
    option = f"kernel_{kind}"
    for name, (class_name, config, _) in keras_values()[kind].items():
        found: Any = checked_object(name, option)
        assert type(found).__name__ == class_name
        for field, value in config.items():
            if isinstance(value, float):  # of which Keras holds some in float32
                value = pytest.approx(value, rel=1e-7)
            assert getattr(found, field) == value, f"{name}.{field}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_keras_is_there_and_no_other(kind: str) -> None:
    classes = {cls.__name__ for cls in OBJECTS[f"kernel_{kind}"].values()}
    assert classes == {class_name for class_name, _, _ in keras_values()[kind].values()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_of_keras_becomes_the_same_object_here(kind: str) -> None:
    option = f"kernel_{kind}"
    for class_name, config, ours in keras_values()[kind].values():
        spec = {"class_name": class_name, "config": config}
        assert checked_object(ours, option) == checked_object(spec, option)


# --- forms ---------------------------------------------------------------------------------------
FORMS = {
    "he_normal": HeNormal(),
    "HeNormal": HeNormal(),
    "normal": checked_object("random_normal", "kernel_initializer"),
    "glorot_uniform": GlorotUniform(),
}


@pytest.mark.parametrize(("form", "expected"), FORMS.items(), ids=FORMS)
def test_an_initialiser_by_name(form: str, expected: Any) -> None:
    assert config_of(kernel_initializer=form).kernel_initializer == expected


def test_one_object_in_every_form_is_one_config() -> None:
    forms = [
        L2(0.1),
        {"class_name": "L2", "config": {"l2": 0.1}},
        {"class_name": "l2", "config": {"l2": 0.1}, "module": "keras.regularizers"},
        config_of(kernel_regularizer=L2(0.1)).to_dict()["kernel_regularizer"],
    ]
    configs = {config_of(kernel_regularizer=form) for form in forms}
    assert len(configs) == 1
    assert config_of(kernel_regularizer=L2(0.2)) not in configs


def test_a_class_stands_for_its_object_with_defaults() -> None:
    assert config_of(kernel_regularizer=L1).kernel_regularizer == L1(0.01)
    assert config_of(kernel_constraint=MaxNorm).kernel_constraint == MaxNorm(2, axis=0)


def test_an_object_like_those_of_keras_is_taken_by_its_class_and_config() -> None:
    """Keras's own are: their module is Keras's. A class of the user's is called instead."""

    class Identity:
        gain = 3.0

        def get_config(self) -> dict[str, Any]:
            return {}  # as Keras's, which leaves out its gain

        def __call__(self, shape: Any, dtype: Any = None) -> Any:
            raise NotImplementedError

    of_user = Identity()
    assert config_of(kernel_initializer=of_user).kernel_initializer is of_user
    Identity.__module__ = "keras.src.initializers.constant_initializers"
    assert described(config_of(kernel_initializer=Identity()).kernel_initializer) == {
        "class_name": "Identity",
        "config": {"gain": 3.0},
    }


def test_l1_l2_has_both_of_its_names_and_no_penalty_by_name_alone() -> None:
    for name in ("l1_l2", "l1l2", "L1L2"):
        assert config_of(kernel_regularizer=name).kernel_regularizer == L1L2(0, 0)


# --- kept ----------------------------------------------------------------------------------------
KEPT: dict[str, dict[str, Any]] = {
    "names": {"kernel_initializer": "lecun_normal", "bias_constraint": "non_neg"},
    "dicts": {
        "kernel_initializer": VarianceScaling(2.0, "fan_avg", "uniform", seed=4),
        "bias_initializer": Constant(0.5),
        "kernel_regularizer": OrthogonalRegularizer(0.3, "columns"),
        "bias_regularizer": L1L2(0.1, 0.2),
        "activity_regularizer": L1(0.1),
        "kernel_constraint": UnitNorm([0, 1]),  # pyright: ignore[reportArgumentType]
        "bias_constraint": MaxNorm(3),
    },
}


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_config_survives_json(options: dict[str, Any]) -> None:
    config = config_of(**options)
    again = anymha.AttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_config_shows_names_where_all_is_as_by_default() -> None:
    kept = config_of(kernel_regularizer=L2(), kernel_constraint=UnitNorm((0, 1))).to_dict()
    assert kept["kernel_initializer"] == "glorot_uniform"
    assert kept["bias_regularizer"] is None
    assert kept["kernel_regularizer"] == "l2"
    assert kept["kernel_constraint"] == {"class_name": "UnitNorm", "config": {"axis": [0, 1]}}


def test_callables_stay_what_they_are() -> None:
    def mine(w: Any) -> Any:
        return w

    config = config_of(kernel_constraint=mine)
    assert config.to_dict()["kernel_constraint"] is mine
    assert anymha.AttentionConfig.from_dict(config.to_dict()) == config


def test_an_object_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        L2(0.1).l2 = 0.2  # pyright: ignore[reportAttributeAccessIssue]


# --- refusals ------------------------------------------------------------------------------------
NAMES = (
    "'constant', 'glorot_normal', 'glorot_uniform', 'he_normal', 'he_uniform', 'identity', "
    "'lecun_normal', 'lecun_uniform', 'ones', 'orthogonal', 'random_normal', 'random_uniform', "
    "'truncated_normal', 'variance_scaling', 'zeros'"
)


def of(class_name: str, **config: Any) -> dict[str, Any]:
    return {"kernel_initializer": {"class_name": class_name, "config": config}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": (
        {"kernel_initializer": "xavier"},
        f"`kernel_initializer` must be one of {NAMES}. Received: 'xavier'.",
    ),
    "None": (
        {"bias_initializer": None},
        f"`bias_initializer` must be one of {NAMES}; or a dict of 'class_name' and 'config'; or "
        "an object of this kind; or callable. Received: None.",
    ),
    "field": (
        of("HeNormal", scale=2),
        "`kernel_initializer`, HeNormal: `HeNormal` takes no `scale`. Received: scale=2. It takes: "
        "seed, input_axes, output_axes.",
    ),
    "no field": (
        of("Zeros", value=1),
        "`kernel_initializer`, Zeros: `Zeros` takes no `value`. Received: value=1. It takes: "
        "nothing.",
    ),
    "stddev": (
        of("RandomNormal", stddev=-1),
        "`kernel_initializer`, RandomNormal: `stddev` must be a finite number of at least 0. "
        "Received: -1.",
    ),
    "infinite": (
        of("Constant", value=float("inf")),
        "`kernel_initializer`, Constant: `value` must be a finite number. Received: inf.",
    ),
    "boolean": (
        of("Identity", gain=True),
        "`kernel_initializer`, Identity: `gain` must be a finite number. Received: True.",
    ),
    "order": (
        of("RandomUniform", minval=1.0, maxval=0.0),
        "`kernel_initializer`, RandomUniform: `maxval` must be a finite number of at least 1. "
        "Received: 0.0.",
    ),
    "scale": (
        of("VarianceScaling", scale=0),
        "`kernel_initializer`, VarianceScaling: `scale` must be above 0. Received: 0.",
    ),
    "mode": (
        of("VarianceScaling", mode="fan"),
        "`kernel_initializer`, VarianceScaling: `mode` must be one of 'fan_in', 'fan_out', "
        "'fan_avg'. Received: 'fan'.",
    ),
    "seed": (
        of("HeNormal", seed=0.5),
        "`kernel_initializer`, HeNormal: `seed` must be an integer, or None to draw one. "
        "Received: 0.5.",
    ),
    "axes": (
        of("HeNormal", input_axes=["last"]),
        "`kernel_initializer`, HeNormal: `input_axes` must be an integer or a tuple of integers, "
        "each once. Received: ['last'].",
    ),
    "identity bias": (
        {"bias_initializer": Identity(2)},
        "`bias_initializer` must fit arrays of 1 axes, which this layer has. Received: "
        "Identity(gain=2.0); it makes matrices only.",
    ),
    "orthogonal bias": (
        {"bias_initializer": "orthogonal"},
        "`bias_initializer` must fit arrays of 1 axes, which this layer has. Received: "
        "Orthogonal(gain=1.0, seed=None); it makes arrays of two or more axes only.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_initialisers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**options)
    assert str(error.value) == message


def test_a_callable_that_cannot_be_hashed_is_refused() -> None:
    class Equal:
        def __eq__(self, other: object) -> bool:
            return True

        def __call__(self, w: Any) -> Any:
            return w

    with pytest.raises(ConfigError, match="`kernel_constraint` must be hashable"):
        config_of(kernel_constraint=Equal())


def test_biases_of_two_axes_take_what_needs_matrices() -> None:
    config_of(bias_initializer="identity", bias_regularizer="orthogonal", output_shape=(4, 5))
