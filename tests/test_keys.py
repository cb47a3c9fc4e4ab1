"""Names of chunks and namespaces."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixstore.errors import InvalidError
from prefixstore.keys import key_from_hex, kv_group, make_key, namespace_id

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("fields", "canonical"),
    [
        ({}, "{}"),
        ({"b": 1, "a": [None, True]}, '{"a":[null,true],"b":1}'),
        ({"eps": 1e-5, "theta": 1e6}, '{"eps":1e-05,"theta":1000000.0}'),
        ({"large": 1e16, "small": 0.0001}, '{"large":1e+16,"small":0.0001}'),
        ({"int": 1, "float": 1.0}, '{"float":1.0,"int":1}'),
        ({"text": 'é"\\\n\x01/\u2028\x7f'}, '{"text":"é\\"\\\\\\n\\u0001/\u2028\x7f"}'),
        ({"\U0001f600": 1, "\uffff": 2}, '{"\uffff":2,"\U0001f600":1}'),
        ({"tuple": (1, 2)}, '{"tuple":[1,2]}'),
    ],
)
def test_the_canonical_form_of_fields_never_changes(fields, canonical):
    """Another form of the same fields would hide every blob of the namespace."""
    assert namespace_id(fields) == hashlib.sha256(canonical.encode()).hexdigest()[:32]


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
def test_the_order_of_fields_does_not_matter(fields):
    """At the top; below it, too, since every level is sorted."""
    assert namespace_id(fields) == namespace_id(dict(reversed(fields.items())))


@pytest.mark.parametrize("length", [0, 11, 65])
def test_a_key_of_another_length_is_refused(length):
    """Shorter is no hash of vLLM's, longer is no file name."""
    with pytest.raises(InvalidError, match="a key has"):
        make_key(bytes(length))


def test_a_key_knows_its_group():
    """The last four bytes, big-endian; a key survives hex."""
    key = make_key(bytes(32) + (7).to_bytes(4, "big"))

    assert kv_group(key) == 7
    assert key_from_hex(key.hex()) == key
    with pytest.raises(InvalidError, match="hex digits"):
        key_from_hex("no hex")
