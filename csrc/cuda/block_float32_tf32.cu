#include "block_configs.h"

namespace fused_rin {
void append_float32_tf32_instances(std::vector<BlockInstance>& instances) { Tf32Configs::append(instances); }
}  // namespace fused_rin
