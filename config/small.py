# A small model in up to 20 minutes on two CPU cores, of any data set: folio train small --dataset=my
# Depth's rules give the rest (docs/depth.md); folio plan small --dataset=my lists it.
depth = 3
max_flops = 5e13
block_size = 256
log_interval = 10
