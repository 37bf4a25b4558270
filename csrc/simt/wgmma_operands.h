// The operands of wgmma as matrices of floats: "Shared Memory Matrix Layout" decoded from descriptors, and
// "Register Fragments".
#pragma once

#include <array>
#include <vector>

#include "block.h"
#include "instructions.h"
#include "layouts.h"

namespace bigops::simt {

// Of one warp: its 16 rows of A, all of B.
constexpr int kWgmmaRows = 16, kWgmmaDepth = 16, kWgmmaMaxColumns = 256;
using Left = float[kWgmmaRows][kWgmmaDepth];
using Right = float[kWgmmaDepth][kWgmmaMaxColumns];

// A descriptor that may be used; any other ends the launch with a finding.
layouts::MatrixDescriptor checked_descriptor(uint64_t bits, const char* which);

// `transposed`: M or N runs along memory, not K.
void fetch_left(Operand16 type, const layouts::MatrixDescriptor& a, bool transposed, int warp_in_group,
                Agent agent, Left& left);
// Four words of each lane.
void left_of_registers(Operand16 type, const std::vector<uint32_t>& words, Left& left);
void fetch_right(Operand16 type, const layouts::MatrixDescriptor& b, bool transposed, int columns,
                 Agent agent, Right& right);

}  // namespace bigops::simt
