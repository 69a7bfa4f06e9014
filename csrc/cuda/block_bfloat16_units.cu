#include "block_configs.h"

namespace fused_rin {
void append_bfloat16_unit_instances(std::vector<BlockInstance>& instances) {
  MmaUnitConfigs<device::BFloat16>::append(instances);
}
}  // namespace fused_rin
