// Functions that the CPU and the CUDA compiler both compile.
#pragma once

#ifdef __CUDACC__
#define KSM_HOST_DEVICE __host__ __device__
#else
#define KSM_HOST_DEVICE
#endif
