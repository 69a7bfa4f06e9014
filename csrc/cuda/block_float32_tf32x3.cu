#include "block_configs.h"

namespace fused_rin {
void append_float32_tf32x3_instances(std::vector<BlockInstance>& instances) { Tf32x3Configs::append(instances); }
}  // namespace fused_rin
