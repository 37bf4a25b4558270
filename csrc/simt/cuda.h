// What nvcc has built in, for g++: included before every .cu file. __shared__ is thread_local, as a
// block lives on one OS thread; an alignment stands before it: `alignas(128) __shared__ float x[32]`.
#pragma once

#define __global__ __attribute__((used))
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

#include "words.h"
