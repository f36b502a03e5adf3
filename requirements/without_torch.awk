# A lock without torch, torchvision and the CUDA that PyPI's torch brings: what is installed beside a torch from TORCH_INDEX.
# awk -f requirements/without_torch.awk requirements/service.txt
/^[a-z0-9]/ { kept = $1 !~ /^(torch|torchvision|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==/ || $1 ~ /^nvidia-ml-py==/ }
kept
