-- release_nack.lua: gives up to a page of a consumer's pending entries back to the group (Redis 8.8 and later).
-- KEYS[1] stream  ARGV[1] group  ARGV[2] consumer  ARGV[3] page
-- Returns how many entries the consumer had, at most a page.
local p = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[3], ARGV[2])
if #p == 0 then return 0 end
local nack = {'XNACK', KEYS[1], ARGV[1], 'FAIL', 'IDS', #p}
for i = 1, #p do nack[#nack + 1] = p[i][1] end
redis.call(unpack(nack))
return #p
