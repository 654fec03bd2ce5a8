import torch, sys, time
from loglinear.kernels.triton.delta_rule.launch import gradients as grads
from loglinear.ops import log_linear_delta_rule
from tests.ops.operators import OPERATORS
OP=OPERATORS[1]
def check(B,T,G,H,K,V,L,C=16,scale=1.0):
    torch.manual_seed(0)
    x=OP.inputs(B=B,T=T,G=G,H=H,K=K,V=V,L=L)
    x={n:t.detach().double().requires_grad_() for n,t in x.items()}
    out=log_linear_delta_rule(**x,impl='torch',chunk_size=C,output_final_state=True,scale=scale)
    do=torch.randn_like(out.output); db=torch.randn_like(out.final_state.blocks)*(out.final_state.blocks!=0)
    e=torch.autograd.grad((out.output*do).sum()+(out.final_state.blocks*db).sum(),list(x.values()))
    f={n:t.detach().float() for n,t in x.items()}
    t=time.time()
    a=grads(do.float(),db.float(),f['q'],f['k'],f['v'],f['log_decay'],f['beta'],f['level_scales'],None,None,None,scale,C)[:6]
    names=list(x)
    print((B,T,G,H,K,V,L,C),' '.join(f'{n} {float((p.double()-r).norm()/r.norm()):.0e}' for n,p,r in zip(names,a,e)),f'{time.time()-t:.1f}s',flush=True)
if __name__=='__main__':
    check(2,1,1,2,16,16,9); check(1,16,1,1,16,16,9);check(1,17,1,1,16,16,9); check(1,33,1,1,16,16,9); check(2,65,1,2,16,16,9); check(1,150,2,2,24,40,20)
    for L in (1,5,7,8,10,20): check(1,400,1,1,16,16,L)
    check(1,200,1,2,80,72,11); check(1,1300,1,1,16,16,20)
