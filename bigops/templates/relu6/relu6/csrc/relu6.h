// The kernels, once for the CPU (relu6.cpp) and once for a GPU (relu6.cu). The launcher in native.py
// sees to it that a call's tensors are dense and lie alike: only their number of elements counts.
#pragma once

#include "view.h"

void forward(const bigops::View& x, const bigops::View& out);
void backward(const bigops::View& grad_out, const bigops::View& x, const bigops::View& grad_x);
