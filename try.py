import torch, sys, time
from loglinear.kernels.triton.delta_rule.launch import DeltaRule
from loglinear.ops import log_linear_delta_rule
from tests.ops.operators import OPERATORS
OP=OPERATORS[1]
def check(B,T,G,H,K,V,L,C=16,scale=1.0):
    x=OP.inputs(B=B,T=T,G=G,H=H,K=K,V=V,L=L)
    exact=log_linear_delta_rule(**{n:t.double() for n,t in x.items()},impl='torch',chunk_size=C,output_final_state=True,scale=scale)
    f={n:t.float() for n,t in x.items()}
    t=time.time()
    call=DeltaRule(f['q'],f['k'],f['v'],f['log_decay'],f['beta'],f['level_scales'],None,None,None,scale,C)
    call.build_states(); o=call.output(); b=call.final_blocks()
    e=float((o.double()-exact.output).norm()/exact.output.norm())
    eb=exact.final_state.blocks
    d=float((b.double()-eb).norm()/eb.norm().clamp(min=1e-30))
    print((B,T,G,H,K,V,L,C),f'{e:.1e} {d:.1e} {time.time()-t:.1f}s',flush=True)
if __name__=='__main__':
    check(2,1,1,2,16,16,9); check(1,17,1,1,16,16,9); check(2,65,1,2,16,16,9); check(1,150,2,2,24,40,20); check(1,300,1,1,16,16,9,128); check(1,1000,1,1,16,16,9,128); check(1,1100,1,2,80,24,20,128,.3)
    for L in (1,2,5,6,7,8,9,10,12,20,40): check(1,700,1,1,16,16,L)
    check(1,300,1,2,80,72,11); check(1,5000,1,1,16,16,20); check(1,5000,1,1,16,16,7);
