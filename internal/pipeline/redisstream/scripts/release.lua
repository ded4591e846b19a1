-- release.lua: gives up to a page of a consumer's pending entries to another consumer, as idle as told.
-- KEYS[1] stream  ARGV[1] group  ARGV[2] consumer  ARGV[3] page  ARGV[4] new consumer  ARGV[5] idle milliseconds
-- Returns how many entries the consumer had, at most a page.
local p = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[3], ARGV[2])
if #p == 0 then return 0 end
local claim = {'XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0}
for i = 1, #p do claim[#claim + 1] = p[i][1] end
claim[#claim + 1] = 'IDLE'
claim[#claim + 1] = ARGV[5]
claim[#claim + 1] = 'JUSTID'
redis.call(unpack(claim))
return #p
