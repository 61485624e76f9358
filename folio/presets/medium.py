# A medium model in about an hour on a laptop's GPU, of any data set: folio train medium --dataset=my
# Depth's rules give the rest (docs/depth.md); folio plan medium --dataset=my lists it.
depth = 6
max_flops = 5e16
block_size = 512
log_interval = 10
