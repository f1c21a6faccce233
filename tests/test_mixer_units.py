"Maps of parts that are known by content: what is found, what is not, and what must not be found"
import pytest, torch
from numpy.testing import assert_allclose
from lorasuite.core.architecture import BlockArchitecture
from lorasuite.core.block import Block
from lorasuite.core.model import Norm
from lorasuite.stages.mixers import AMBIGUOUS, UNLIKE, behind_norm, expert_similarity, fit_latent_map, inner_roles
from lorasuite.stages.mixers import is_inner, linked_inputs, match_rows, match_units, whole_block

def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def rotation(n, n2=None, seed=0): return torch.linalg.qr(draw(n2 or n, n, seed=seed))[0]

def toy(parts, links=None, before=None, experts=0):
    "A block of some roles: role: (space it reads, space it writes, weight)"
    found = BlockArchitecture({role: role for role in parts}, links=links or {}, experts=experts)
    found.spaces = {role: (reads, writes) for role, (reads, writes, _) in parts.items()}
    found.rows = {role: torch.arange(len(W)) for role, (_, writes, W) in parts.items() if writes != 'stream'}
    ones = {role: torch.ones(len(W)).double() for role, (_, _, W) in parts.items()}
    weights = {role: W for role, (_, _, W) in parts.items()}
    return Block('block', found, weights, before or {}, ones, 16, 'rms')

SAME = torch.eye(16).double()

# --- units -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('moved', [2, 8, 40])
def test_units_are_found_however_few_of_them_moved(moved):
    "In place for most of them is not in place for all: a vote of the majority carried the rest wrongly"
    order = torch.arange(40)
    order[:moved] = order[:moved].flip(0)
    scale = draw(40, seed=1).abs() + .5
    X = draw(40, 16)
    partners, scales = match_units(X, (X*scale[:, None])[order])
    assert torch.equal(partners, order)
    assert_allclose(scales, scale[order], rtol=0, atol=1e-9)

def test_signs_padding_and_zero_units():
    X = draw(12, 16)
    X[3] = 0
    partners, scales = match_units(X, -X)
    assert partners.tolist() == [*range(12)]
    assert_allclose(scales[X.any(1)], -torch.ones(11), rtol=0, atol=1e-9)
    assert match_units(0*X, 0*X)[0].tolist() == [*range(12)]

def test_new_units_without_a_partner():
    X = draw(12, 16)
    wider = torch.cat([X[6:], torch.zeros(4, 16), X[:6]])
    assert match_units(X, wider)[0].tolist() == [*range(6, 12), -1, -1, -1, -1, *range(6)]

def test_units_alike_to_each_other_keep_their_order():
    "All rows share a large component, so every pair has a cosine over 0.7"
    X = draw(12, 16) + 6*draw(1, 16, seed=1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(match_units(X, X[order])[0], order)

@pytest.mark.parametrize('share, found', [(0, True), (.3, False), (.5, False), (1, False)])
def test_a_role_of_which_a_part_has_no_counterparts_is_not_carried(share, found):
    "As the values of latent attention in other coordinates, beside keys that stayed"
    X, X2 = draw(40, 64), draw(40, 64)
    X2[:int(40*share)] = draw(int(40*share), 64, seed=3)
    assert (match_units(X, X2) is not None) == found

@pytest.mark.parametrize('d', [4, 8, 16])
def test_chance_is_larger_in_few_dimensions(d):
    "Half of the rows of a latent's reader in other coordinates, as those of values may be"
    X, X2 = draw(32, d), draw(32, d)
    X2[:16] = draw(16, d, seed=1)
    assert match_units(X, X2) is None

def test_drifted_units_stay_in_place():
    X = draw(200, 64)
    assert match_units(X, X + .5*draw(200, 64, seed=1))[0].tolist() == [*range(200)]

# --- maps of rows and latents ------------------------------------------------------------------------------------

@pytest.mark.parametrize('drift', [.01, .1, .3])
def test_square_rows_get_no_dense_map_for_drift(drift):
    "A square map fits any rows exactly, so a perfect fit is no evidence"
    W = draw(32, 32)
    partners, scales = match_rows(W, W + drift*draw(32, 32, seed=1))
    assert partners.tolist() == [*range(32)]
    assert_allclose(scales, torch.ones(32), rtol=0, atol=2*drift)

@pytest.mark.parametrize('n', [8, 24, 32, 48])
def test_unrelated_rows_get_no_map(n):
    assert match_rows(draw(n, 32), draw(n, 32, seed=1)) is None

def test_a_rotated_part_of_the_rows_is_found():
    W, Q = draw(10, 32), torch.block_diag(rotation(4), torch.eye(6)).double()
    partners, T = match_rows(W, Q@W)
    assert partners is None
    assert_allclose(T, Q, rtol=0, atol=1e-9)

def test_rows_in_another_order_are_units():
    W = draw(10, 32)
    assert match_rows(W, W.flip(0))[0].tolist() == [*range(9, -1, -1)]

def test_latents():
    W = draw(6, 16)
    P = 3*rotation(6, 9)
    assert_allclose(fit_latent_map(W, P@W), P, rtol=0, atol=1e-9)
    assert_allclose(fit_latent_map(W, rotation(6)@W + .3*draw(6, 16, seed=1)), rotation(6), rtol=0, atol=.5)

@pytest.mark.parametrize('n, d', [(6, 64), (24, 32), (30, 32), (32, 32), (40, 32)])
def test_unrelated_latents_have_no_map(n, d):
    "Least squares explains n/d of anything"
    assert fit_latent_map(draw(n, d), draw(n, d, seed=1)) is None

@pytest.mark.parametrize('n', [8, 24, 32, 40])
def test_a_latent_that_drifted_keeps_its_coordinates(n):
    W = draw(n, 32)
    for drift in (0, .01, .3):
        assert torch.equal(fit_latent_map(W, W + drift*draw(n, 32, seed=1)), torch.eye(n).double())

@pytest.mark.parametrize('size', [4, 6, 10])
def test_behind_a_norm(size):
    "Rotated and scaled, padded, or with directions left out that are not used"
    rms = lambda z: z/z.pow(2).mean().sqrt()
    P = rotation(6, size) if size >= 6 else rotation(size, 6).T
    z = draw(6) if size >= 6 else P.T@draw(size)
    assert_allclose(behind_norm(7*P)@rms(z), rms(7*P@z), rtol=0, atol=1e-9)

# --- roles -----------------------------------------------------------------------------------------------------

def latent_block(T=None, gain=None):
    "A latent of 6, with a norm, between `narrow` and `wide`; `T` puts it into other coordinates"
    T = torch.eye(6).double() if T is None else T
    down, up = draw(6, 16), draw(20, 6, seed=1)
    ones = torch.ones(len(T)).double()
    gain = ones if gain is None else gain
    up2 = up@torch.linalg.pinv(behind_norm(T))/gain
    parts = {'wide': ('wide.in', 'wide.out', up2), 'narrow': ('stream', 'narrow.out', T@down)}
    return toy(parts, {'wide': ('narrow', 'norm')}, {'wide': Norm('rms', gain, 0*ones)})

def test_roles_in_the_order_in_which_they_are_mapped():
    block = toy({'b': ('b.in', 'b.out', SAME), 'w': ('w.in', 'stream', SAME), 'r': ('stream', 'r.out', SAME),
                 'q': ('stream', 'heads', SAME)})
    assert inner_roles(block) == ['r', 'w', 'b']
    assert is_inner(('stream', 'r.out')) and not is_inner(('stream', 'heads'))

@pytest.mark.parametrize('size', [6, 9])
def test_an_update_behind_a_latent(size):
    gain = draw(size, seed=4).abs() + .5
    T = 2*rotation(6, size)
    old, new = latent_block(), latent_block(T, gain)
    known = whole_block(old, new, SAME, SAME)
    assert known.unmatched == {}
    rms = lambda z: z/z.pow(2).mean().sqrt()
    u, update = draw(16, seed=5), draw(20, 6, seed=6)
    z, z2 = rms(old.weight('narrow')@u), gain*rms(new.weight('narrow')@u)
    assert_allclose(update@known.maps['wide.in']@z2, update@z, rtol=0, atol=1e-9)

def test_a_latent_that_has_none_is_named_with_its_reader():
    old, new = latent_block(), latent_block()
    new.weights['narrow'] = draw(6, 16, seed=9)
    assert linked_inputs('wide', old, new, {}) is None
    known = whole_block(old, new, SAME, SAME)
    assert known.unmatched == {'narrow': UNLIKE, 'wide': UNLIKE}

@pytest.mark.parametrize('moved', [2, 40])
def test_the_best_input_is_taken_and_not_the_first_that_fits(moved):
    "Two channels of forty: in place, the rows of `x` would still have cosines over 0.9"
    order = torch.arange(40)
    order[:moved] = order[:moved].flip(0)
    out, x = draw(16, 40), draw(12, 40, seed=1)
    build = lambda order: toy({'out': ('out.in', 'stream', out[:, order]), 'x': ('x.in', 'x.out', x[:, order])})
    known = whole_block(build(torch.arange(40)), build(order), SAME, SAME)
    assert torch.equal(known.partners['x.in'], order) and torch.equal(known.partners['out.in'], order)

def test_a_role_with_other_spaces_is_named():
    old = toy({'w': ('stream', 'w.out', draw(16, 16))})
    new = toy({'w': ('w.in', 'stream', draw(16, 16))})
    assert whole_block(old, new, SAME, SAME).unmatched == {'w': UNLIKE}

# --- experts -----------------------------------------------------------------------------------------------------

def experts(order=(0, 1, 2, 3), shift=0., scale=1., alike=False):
    "Four experts of eight neurons with a router"
    parts = {'router': ('stream', 'experts', scale*draw(4, 16, seed=8)[[*order]] + shift)}
    for new, e in enumerate(order):
        gate, up, down = draw(3, 8, 16, seed=0 if alike else e)
        space = f'experts.{new}.neurons'
        neurons = torch.randperm(8, generator=torch.Generator().manual_seed(new))
        parts |= {f'experts.{new}.{role}': ('stream', space, W[neurons]) for role, W in (('gate', gate), ('up', up))}
        parts[f'experts.{new}.down'] = (space, 'stream', down.T[:, neurons])
    return toy(parts, experts=len(order))

@pytest.mark.parametrize('alike', [False, True])
def test_experts_are_found(alike):
    "Copies of one MLP are told apart by their router"
    order = [2, 0, 3, 1]
    known = whole_block(experts(alike=alike), experts(order, alike=alike), SAME, SAME)
    assert known.partners['experts'].tolist() == order
    for role in ('gate', 'up', 'down'): assert_allclose(known.maps[f'experts.{role}'], 1, rtol=0, atol=1e-9)

def test_what_all_rows_of_a_router_have_in_common_changes_no_update():
    known = whole_block(experts(), experts([2, 0, 3, 1], draw(16, seed=9)), SAME, SAME)
    assert known.partners['experts'].tolist() == [2, 0, 3, 1]
    assert_allclose(known.maps['router'], torch.ones(4), rtol=0, atol=1e-9)

def test_a_router_has_one_scale():
    known = whole_block(experts(), experts(scale=3.), SAME, SAME)
    assert_allclose(known.maps['router'], torch.full((4,), 3.), rtol=0, atol=1e-9)

@pytest.mark.parametrize('order', [(0, 1, 3), (2,)])
def test_fewer_experts(order):
    known = whole_block(experts(), experts(order), SAME, SAME)
    assert known.partners['experts'].tolist() == [*order]
    assert known.partners['experts.neurons'].shape == (len(order), 8)

def test_more_experts():
    known = whole_block(experts((0, 2)), experts(), SAME, SAME)
    assert known.partners['experts'].tolist() == [0, -1, 1, -1]
    assert (known.partners['experts.neurons'][1] == -1).all()
    assert known.maps['router'].isfinite().all()

def test_similarity_has_both_kinds_of_evidence():
    S = expert_similarity(experts(), experts(), SAME, SAME)
    assert_allclose(S.diagonal(), torch.full((4,), 2.), rtol=0, atol=1e-5)
    assert (S - 2*torch.eye(4)).abs().max() < 1.5

# --- what looks like drift and is none ---------------------------------------------------------------------------

@pytest.mark.parametrize('degrees', [10, 30, 45])
def test_units_turned_in_pairs_are_no_drift(degrees):
    "In a plane the larger of two cosines is at least 0.71: every turned row looks like its partner"
    angle = torch.tensor(degrees).double().deg2rad()
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    X = draw(40, 32)
    assert match_units(X, torch.block_diag(*[turn]*20)@X) is None
    assert match_units(X, X + .3*draw(40, 32, seed=1)) is not None

def test_one_turned_pair_among_units_that_are_the_same_is_enough():
    X, X2 = draw(40, 32), draw(40, 32)
    X2[2:4] = rotation(2, seed=3)@X[2:4]
    assert match_units(X, X2) is None

def test_equal_units_of_a_mixer_that_moved_are_named():
    "Two value heads that share their rows: only the output projection tells that they changed places"
    rows, columns = draw(6, 16), draw(16, 6, seed=1)
    rows[1] = rows[0]
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    block = lambda W, O: toy({'mix.v': ('stream', 'mix.v.out', W), 'mix.o': ('mix.o.in', 'stream', O)})
    maps = whole_block(block(rows, columns), block(rows[order], columns[:, order]), SAME, SAME)
    assert maps.unmatched == {'mix.v': AMBIGUOUS} and maps.partners['mix.o.in'].tolist() == order.tolist()
    itself = whole_block(block(rows, columns), block(rows, columns), SAME, SAME)
    assert not itself.unmatched and itself.partners['mix.v.out'].tolist() == [*range(6)]
