"""A selection is a value with a text form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechscope.errors import SettingsError
from mechscope.subject.components import Components
from tests import families

index = st.integers(0, 99)
pairs = st.lists(st.tuples(index, index), max_size=6)
components = st.builds(Components, pairs, st.lists(index, max_size=6), st.lists(index, max_size=6), experts=pairs)


@given(components)
def test_the_text_form_reads_back_as_the_same_selection(selection: Components) -> None:
    assert Components.parse(str(selection)) == selection


@given(components, components)
def test_set_operations_act_part_by_part_as_on_sets(one: Components, two: Components) -> None:
    for name in ("heads", "mlps", "layers", "experts"):
        first, second = set(getattr(one, name)), set(getattr(two, name))
        assert getattr(one | two, name) == tuple(sorted(first | second))
        assert getattr(one & two, name) == tuple(sorted(first & second))
        assert getattr(one - two, name) == tuple(sorted(first - second))


@given(components)
def test_a_selection_is_true_if_it_holds_anything(selection: Components) -> None:
    assert bool(selection) == (str(selection) != "none")
    assert len(selection) == sum(map(len, (selection.heads, selection.mlps, selection.layers, selection.experts)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a3.h5,m3", Components(heads=((3, 5),), mlps=(3,))),
        ("layers:2,3,5", Components(layers=(2, 3, 5))),
        ("a3.h5,a4.h1,layers:0", Components(heads=((3, 5), (4, 1)), layers=(0,))),
        ("layers:0-3,a5.h1", Components(heads=((5, 1),), layers=(0, 1, 2, 3))),
        ("layers:1,4-5,m2,layers:9", Components(mlps=(2,), layers=(1, 4, 5, 9))),
        ("m3.e5,m3,m0.e12", Components(mlps=(3,), experts=((0, 12), (3, 5)))),
        (" a3.h5 , m3 ", Components(heads=((3, 5),), mlps=(3,))),
        ("none", Components()),
        ("", Components()),
    ],
)
def test_every_written_form_is_understood(text: str, expected: Components) -> None:
    assert Components.parse(text) == expected


def test_parts_are_sorted_and_without_repeats_so_equal_selections_are_equal_values() -> None:
    assert Components.of_heads([(4, 1), (3, 5), (4, 1)]) == Components.parse("a3.h5,a4.h1")
    assert hash(Components.of_layers([5, 2, 2])) == hash(Components.parse("layers:2,5"))


@pytest.mark.parametrize(
    "text", ["h5", "a3", "a3.h", "layers:", "layers:2-", "m", "3", "a3h5", "m3;m4", "m3.e", "m3e5", "a3.e5", "layers:a", "a-1.h2"]
)
def test_a_part_that_is_not_understood_is_named_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(
        SettingsError,
        match=r"component .* is not understood: write heads as 'a3.h5', MLPs as 'm3', experts as 'm3.e5', mixers .* 'mixer3', whole layers",
    ):
        Components.parse(text)


def test_a_span_that_runs_backwards_is_refused() -> None:
    with pytest.raises(SettingsError, match="'layers:5-2' runs backwards: write 'layers:2-5'"):
        Components.parse("layers:5-2")


def test_a_whole_layer_expands_to_its_heads_and_its_mlp() -> None:
    assert Components.parse("layers:1,a0.h2,m0").expand(2) == Components.parse("a0.h2,a1.h0,a1.h1,m0,m1")


@pytest.mark.parametrize(("text", "part"), [("a3.h0", "a3.h0"), ("a0.h4", "a0.h4"), ("m3", "m3"), ("layers:0,7", "layers:7")])
def test_a_part_outside_the_model_is_named_with_the_models_size(text: str, part: str) -> None:
    anatomy = families.subject("gpt2").anatomy
    with pytest.raises(SettingsError, match=rf"component {part} does not exist: the model has layers 0-2 with heads 0-3"):
        Components.parse(text).validate(anatomy)


def test_a_selection_inside_the_model_is_returned_as_it_is() -> None:
    selection = Components.parse("a2.h3,m2,layers:0")
    assert selection.validate(families.subject("gpt2").anatomy) is selection
