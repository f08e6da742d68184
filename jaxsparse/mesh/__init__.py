# SPDX-License-Identifier: Apache-2.0
"""Meshes: our own with its three axes, and whatever mesh a caller has."""

from jaxsparse.mesh.guest import DEFAULT_AXES as DEFAULT_AXES
from jaxsparse.mesh.guest import Axes as Axes
from jaxsparse.mesh.guest import Inside as Inside
from jaxsparse.mesh.guest import entries as entries
from jaxsparse.mesh.guest import inside as inside
from jaxsparse.mesh.guest import least as least
from jaxsparse.mesh.guest import mean as mean
from jaxsparse.mesh.guest import most as most
from jaxsparse.mesh.guest import part as part
from jaxsparse.mesh.guest import total as total
from jaxsparse.mesh.guest import whole as whole
from jaxsparse.mesh.layout import EXPERT_LAYOUT as EXPERT_LAYOUT
from jaxsparse.mesh.layout import TABLE_LAYOUTS as TABLE_LAYOUTS
from jaxsparse.mesh.layout import TOKENS as TOKENS
from jaxsparse.mesh.layout import WHOLE as WHOLE
from jaxsparse.mesh.layout import TableLayout as TableLayout
from jaxsparse.mesh.own import AXES as AXES
from jaxsparse.mesh.own import abstract as abstract
from jaxsparse.mesh.own import act as act
from jaxsparse.mesh.own import axis_sizes as axis_sizes
from jaxsparse.mesh.own import gather as gather
from jaxsparse.mesh.own import gathered as gathered
from jaxsparse.mesh.own import make_mesh as make_mesh
from jaxsparse.mesh.own import num_token_shards as num_token_shards
from jaxsparse.mesh.own import over_tokens as over_tokens
from jaxsparse.mesh.own import param as param
from jaxsparse.mesh.own import partial as partial
from jaxsparse.mesh.own import per_device as per_device
from jaxsparse.mesh.own import reshard as reshard
from jaxsparse.mesh.own import sharded as sharded
from jaxsparse.mesh.own import shards as shards
from jaxsparse.mesh.own import spec_of as spec_of
from jaxsparse.mesh.own import split_copies as split_copies
from jaxsparse.mesh.own import table as table
from jaxsparse.mesh.own import table_layout as table_layout
