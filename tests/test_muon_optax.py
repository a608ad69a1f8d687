"""optax/contrib/_muon_test.py, with lowmem.muon in float32 formats in Optax's place."""

import functools
from unittest import mock

from optax.contrib import _muon, _muon_test

import optax_lowmem as lowmem

_FORMATS = {"weights": "fp32", "mu": "fp32", "adam_mu": "fp32", "adam_nu": "fp32"}


class MuonTest(_muon_test.MuonTest):
  """Optax's cases."""

  def setUp(self):
    super().setUp()
    ours = functools.partial(lowmem.muon, **_FORMATS)
    self.enter_context(mock.patch.object(_muon, "muon", ours))

  def test_ours(self):
    """The cases run with ours."""
    assert isinstance(_muon.muon, functools.partial)


# They index the state of optax.contrib.muon; tests/test_muon.py tests which leaf goes where.
for _name in [name for name in dir(MuonTest) if name.startswith("test_dim_nums_combinations")]:
  setattr(MuonTest, _name, None)
