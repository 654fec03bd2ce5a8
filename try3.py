import torch
from tests.kernels import test_triton as t
from tests.ops.operators import OPERATORS
t.OPERATOR=OPERATORS[1]
t.test_any_length(17); print('len')

for l in ():
    for s in (1,16,37,100): t.test_continues_a_state(l,s); print('state',l,s,flush=True)
t.test_continues_packed_states_at_different_positions(); print('ok')
for e in ([0, 0, 20], [0, 20, 20], [0, 0, 0]):
    for p in [(65 * 16, 3 * 16), (65 * 16, 67 * 16)]: t.test_a_continued_sequence_without_new_tokens(p,e); print(e,p,flush=True)
for d in (0.,3.,40.): t.test_decays_from_none_to_strong(d)
for s in [(1, 3, 5, 3), (2, 4, 16, 40), (2, 2, 24, 16), (1, 4, 48, 20)]: t.test_groups_and_head_dims(s)
t.test_full_resets_leave_the_same_state()
print('all')
