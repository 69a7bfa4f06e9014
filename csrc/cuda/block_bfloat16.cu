#include "block_configs.h"

namespace fused_rin {
void append_bfloat16_instances(std::vector<BlockInstance>& instances) {
  MmaConfigs<device::BFloat16>::append(instances);
}
}  // namespace fused_rin
