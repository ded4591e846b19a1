-- refresh.lua: shows a sign of life for entries, if they still belong to the consumer.
-- KEYS[1] stream  ARGV[1] group  ARGV[2] consumer  ARGV[3…] ids
-- Returns the ids that belong to another consumer now, or to none. They are left alone.
local mine, lost = {}, {}
for i = 3, #ARGV do
  local p = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if #p == 1 then mine[#mine + 1] = ARGV[i] else lost[#lost + 1] = ARGV[i] end
end
if #mine > 0 then
  -- JUSTID resets the idle time and does not count a delivery.
  mine[#mine + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(mine))
end
return lost
